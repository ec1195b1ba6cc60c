// One program that is a whole Kubernetes control plane: the first argument says which part this process plays.
// Owns only the choice. Each part is the upstream code of the released binary, linked as a library, because the
// released binaries cannot be fetched by package name and tests need the real validation, defaulting and scheduling.
//
//	C1  a process constructs one command: each constructor installs the process's signal handler, a second one panics.
//	C2  nothing listens anywhere but where its flags say; the caller passes loopback addresses.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"go.etcd.io/etcd/server/v3/embed"
	helm "helm.sh/helm/v4/pkg/cmd"
	"helm.sh/helm/v4/pkg/kube"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlutil "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
)

const usage = "usage: controlplane etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubectl|helm [arguments]"

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	part := os.Args[1]
	os.Args = append([]string{part}, os.Args[2:]...) // upstream commands read os.Args themselves
	os.Exit(run(part))
}

func run(part string) int {
	switch part {
	case "etcd":
		return failed(serveEtcd(os.Args[1:]))
	case "kube-apiserver":
		return cli.Run(apiserver.NewAPIServerCommand())
	case "kube-controller-manager":
		return cli.Run(controllermanager.NewControllerManagerCommand())
	case "kube-scheduler":
		return cli.Run(scheduler.NewSchedulerCommand())
	case "kubectl":
		kubectlutil.CheckErr(cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand())) // prints and exits as kubectl does
		return 0
	case "helm":
		return runHelm()
	default:
		fmt.Fprintf(os.Stderr, "%q is no part of the control plane; %s\n", part, usage)
		return 2
	}
}

func runHelm() int {
	kube.ManagedFieldsManager = "helm"
	command, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err != nil {
		return failed(err)
	}
	err = command.Execute() // prints its own error
	if exit, ok := errors.AsType[helm.CommandError](err); ok {
		return exit.ExitCode
	}
	if err != nil {
		return 1
	}
	return 0
}

// serveEtcd keeps one member until SIGTERM or SIGINT. It never syncs its files: a test's cluster need not survive the machine.
func serveEtcd(arguments []string) error {
	flags := flag.NewFlagSet("etcd", flag.ContinueOnError)
	folder := flags.String("data-dir", "", "folder of the member's files")
	client := flags.String("listen-client-url", "", "where clients connect, http://127.0.0.1:PORT")
	peer := flags.String("listen-peer-url", "", "where peers would connect, http://127.0.0.1:PORT")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	clientUrl, err := url.Parse(*client)
	if err != nil {
		return fmt.Errorf("--listen-client-url: %w", err)
	}
	peerUrl, err := url.Parse(*peer)
	if err != nil {
		return fmt.Errorf("--listen-peer-url: %w", err)
	}
	config := embed.NewConfig()
	config.Dir = *folder
	config.LogLevel = "error"
	config.UnsafeNoFsync = true
	config.ListenClientUrls, config.AdvertiseClientUrls = []url.URL{*clientUrl}, []url.URL{*clientUrl}
	config.ListenPeerUrls, config.AdvertisePeerUrls = []url.URL{*peerUrl}, []url.URL{*peerUrl}
	config.InitialCluster = config.InitialClusterFromName(config.Name)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	member, err := embed.StartEtcd(config)
	if err != nil {
		return err
	}
	defer member.Close()
	select {
	case err := <-member.Err():
		return err
	case <-stop:
		return nil
	}
}

func failed(err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}
