"""Dense prediction: a feature pyramid on a backbone, and models for segmentation and detection."""
