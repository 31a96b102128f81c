"""The training engine: one loop on Lightning Fabric, checkpoints, schedules, logs. It never names a stage."""
