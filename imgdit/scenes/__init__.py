"""The procedural world: scenes with exact ground truth, their captions, tasks, data sets and readers. The
library does not import it."""
