"""SAF and MESA: methods that add a term to the loss and do not perturb the weights."""
