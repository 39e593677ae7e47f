"""What runs on a machine: training, sampling, the demo, the command line."""
