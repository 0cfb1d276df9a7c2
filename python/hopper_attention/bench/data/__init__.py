"""Problems as data, the rows of a run and the file that keeps them, and their statistics."""
