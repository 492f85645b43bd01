"""Generated wire types and stubs of protos/qanchor/v1; regenerate with scripts/protos."""
