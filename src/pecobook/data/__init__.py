"""The path of images from `--data SOURCE` to a batch; everything random here is a pure function of its key.

images.py                           opens a source of any form: folders.py, tables.py, shards.py, photos.py
names.py                            what the names of files and folders say: splits, images, masks
layout.py, parts.py                 from folders and columns of labels to splits with classes
source.py                           `Store` reads rows, `ImageSource` is one split, `Splits` are both
mapped.py                           large columns of these in files that are mapped into memory
decode.py, formats.py, deep.py      from bytes to pixels; value_range.py for more than 8 bits
views.py, masking.py                from pixels to views and masks, by a key
sampler.py                          the order of images and the keys, without state
stream.py, loading.py, batch.py     from positions to batches, in several processes
summary.py, record.py               what a source holds, and whether it has changed
tokens.py                           the token bank, which replays the codes of views
dense/                              the same for images with masks or objects
"""
