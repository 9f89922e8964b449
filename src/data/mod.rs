//! Sources of labelled images, splits, augmentation and the loader.
