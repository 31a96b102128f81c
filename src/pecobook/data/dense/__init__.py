"""Sources and views of images with masks or objects, for segmentation and detection."""
