"""What people do with a trained model: search, thresholds, choice of settings, export, comparison."""
