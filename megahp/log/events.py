"""Names of events that decide how a log is read."""

GONE_BACK = ("resumed", "rewound")  # to a checkpoint of the run's own
STARTS = ("started", "branched", *GONE_BACK)  # events after which a batch plan goes on
