"""Tables, plots and comparisons of runs, and the ledger of what hardware has seen."""
