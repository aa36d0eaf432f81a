"""What runs came to: tables, curves and one HTML page."""
