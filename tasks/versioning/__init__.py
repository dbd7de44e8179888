"""DVC: dvc.yaml from the stage table, and finished stages committed to it. Knows no stage's work."""
