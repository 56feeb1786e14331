"""What readers see, made from the CSV files alone: the plots and the tables of `docs/performance.md`."""
