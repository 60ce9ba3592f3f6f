"""`lockstep doctor`: checks of the machine, the model and the cluster before anything is loaded."""
