// probe is the only program in the smallest pods of the tests. It is static and needs no other
// file. Its first argument says what it does:
//
//	wait          nothing, until it is told to end (the sandbox of every pod does this, too)
//	say WORD...   prints the words
//	env           prints its environment
//	serve WORD    answers every request on port 8080 with the word
//	get URL       prints the status and the body of what is there, within half a minute
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	words := append(os.Args[1:], "", "")
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-ended
		os.Exit(0)
	}()
	if err := do(words[0], words[1], os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func do(what, with string, all []string) error {
	switch what {
	case "", "wait":
		select {}
	case "say":
		fmt.Println(strings.Join(all[2:], " "))
		return nil
	case "env":
		fmt.Println(strings.Join(os.Environ(), "\n"))
		return nil
	case "serve":
		return http.ListenAndServe(":8080", http.HandlerFunc(
			func(answer http.ResponseWriter, _ *http.Request) { fmt.Fprintln(answer, with) }))
	case "get":
		return get(with)
	}
	return fmt.Errorf("probe does not know %q", what)
}

// A new service answers only once the node's rules know it: a first attempt may be lost for good.
func get(url string) error {
	client := http.Client{Timeout: 3 * time.Second}
	answer, err := client.Get(url)
	for end := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond)
		answer, err = client.Get(url)
	}
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	fmt.Println(answer.StatusCode, strings.TrimSpace(string(body)))
	return err
}
