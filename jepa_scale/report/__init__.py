"""Reports: the page of a run, the comparison of several runs, and the breakdown of the time of a step."""
