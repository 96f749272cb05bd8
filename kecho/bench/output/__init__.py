"""What is told of a result: table, plot, page, progress, and the files that it goes to."""
