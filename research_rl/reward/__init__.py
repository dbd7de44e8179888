"""What an episode is worth: rules, terms, judge, metrics, signs of reward hacking. Reads trajectories; knows no trainer."""
