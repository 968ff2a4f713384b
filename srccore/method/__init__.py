"""The method of SRC: pure functions over records, without files or model libraries."""
