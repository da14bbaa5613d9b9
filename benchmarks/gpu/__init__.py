"""`make gpu`: everything that needs a GPU, in one command that ends in nine minutes."""
