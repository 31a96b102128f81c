"""Sources and views of images with masks or objects, for segmentation and detection.

segmentation.py             opens images with masks: segmentation_pairs.py finds them, mask_files.py decodes a mask
class_files.py              reads names, values and colours of classes; segmentation_classes.py applies them
segmentation_check.py       checks all pairs, after mask_meaning.py has decided what the pixels of all masks mean
detection.py                opens images with objects: coco_files.py finds them, coco.py reads the annotations
coco_annotations.py         the annotations as arrays; coco_values.py and coco_check.py check them
views.py                    views of an image together with its mask or objects
"""
