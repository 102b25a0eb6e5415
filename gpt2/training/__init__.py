"""Training: the settings of a run, its steps, its folder and its reports."""
