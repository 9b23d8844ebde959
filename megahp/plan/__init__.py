"""Plan a run before it is queued: what one step of the product itself computes, allocates and sends, and how long that
takes on a machine."""
