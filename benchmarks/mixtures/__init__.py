"""Models trained for one purpose: to show where a head can do with a summary of what is far, and where it cannot."""
