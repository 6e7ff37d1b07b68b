"""What ``moescale bench`` runs: our code, its peers and the floor side by side. Entry: `run.run`."""
