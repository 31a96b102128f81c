"""What any part may use: processes, devices, files, sizes of images."""
