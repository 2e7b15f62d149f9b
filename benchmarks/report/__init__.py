"""The comparison as one HTML file: inline SVG, no scripts, nothing from the network, light and dark."""
