"""SAF and MESA: sharpness through the loss along the trajectory, without ascent."""
