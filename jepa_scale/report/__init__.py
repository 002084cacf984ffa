"""Reports: a run's page, several runs beside each other, where the time of a step went."""
