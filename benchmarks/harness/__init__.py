"""How everything is measured, whatever it is: times, memory, the check before timing, CSV rows, their provenance."""
