"""Methods: pure functions that turn a weight and its statistics into a QTensor. They know no file."""
