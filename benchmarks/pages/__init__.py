"""The plots and the tables of `docs/performance.md`, made from the CSV files alone."""
