"""How exact every operator is on this machine, beside eager PyTorch and against float64."""
