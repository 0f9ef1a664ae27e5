"""What a student learns from: teachers run, routed, placed, standardised, cached."""
