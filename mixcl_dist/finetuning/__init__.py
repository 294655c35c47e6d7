"""A few labelled cases and a start → a segmentation network and its Dice."""
