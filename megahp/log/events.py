"""Groups of event names that decide how a log is read."""

GONE_BACK = ("resumed", "rewound")  # events that return to a checkpoint of the same run
STARTS = ("started", "branched", *GONE_BACK)  # events after which training begins or continues
