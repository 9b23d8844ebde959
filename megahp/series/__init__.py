"""Numbers as tokens: C2FAR's bins, SutraNets' orders, windows of a series, and measures of a forecast. numpy alone."""
