//go:build tools

// Package tools pins the programs of this folder: see ../../build.py.
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
)
