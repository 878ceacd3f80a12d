"""Events out of files and into files, and what an operator does with recorded ones: retry, archive, rename."""
