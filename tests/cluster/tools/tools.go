//go:build tools

// Package tools pins the server programs that the tests run, with all they are built from.
// tests/cluster/build.py builds each import below. Another version: go get PACKAGE@VERSION and
// go mod tidy, in this folder.
package tools

import (
	_ "github.com/versity/versitygw/cmd/versitygw"
)
