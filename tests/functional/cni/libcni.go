// SPDX-License-Identifier: Apache-2.0

// A CNI runtime of libcni, which containerd, CRI-O, Podman and Multus use:
// libcni COMMAND CONFLIST PLUGIN_DIRS CONTAINER NETNS IFNAME
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
)

func run() error {
	if len(os.Args) != 7 {
		return fmt.Errorf("usage: %s COMMAND CONFLIST PLUGIN_DIRS "+
			"CONTAINER NETNS IFNAME", os.Args[0])
	}
	list, err := libcni.ConfListFromFile(os.Args[2])
	if err != nil {
		return err
	}
	// Results are kept in the cache, as by runtimes.
	cni := libcni.NewCNIConfigWithCacheDir(
		filepath.SplitList(os.Args[3]), "/run/cni-cache", nil)
	container := &libcni.RuntimeConf{
		ContainerID: os.Args[4], NetNS: os.Args[5], IfName: os.Args[6],
		Args: [][2]string{{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", "web-0"}},
	}
	ctx := context.Background()
	switch os.Args[1] {
	case "VALIDATE":
		_, err = cni.ValidateNetworkList(ctx, list)
	case "ADD":
		result, err := cni.AddNetworkList(ctx, list, container)
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(result)
	case "CHECK":
		err = cni.CheckNetworkList(ctx, list, container)
	case "DEL":
		err = cni.DelNetworkList(ctx, list, container)
	default:
		err = fmt.Errorf("no command %q", os.Args[1])
	}
	return err
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
