"""What a run amounts to: curves, paired differences, pages to look at."""
