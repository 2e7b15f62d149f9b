"""The comparison as one HTML file: inline SVG, no script, nothing from the network, light and dark."""
