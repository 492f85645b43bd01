"""Reports for people: one HTML file with tables and plots, nothing outside of it."""
