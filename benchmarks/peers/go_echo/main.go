// go_echo: a goroutine for each connection, a 64 KiB buffer for each goroutine.
//
//	go_echo PORT [BACKLOG]
//
// Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.
// The backlog is taken and not used: Go always asks for net.core.somaxconn. TCP_NODELAY is Go's
// default; GOMAXPROCS follows the CPU affinity.
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

const bufferBytes = 64 << 10

func serve(connection net.Conn) {
	defer connection.Close()
	buffer := make([]byte, bufferBytes)
	for {
		size, err := connection.Read(buffer)
		if size > 0 {
			if _, failed := connection.Write(buffer[:size]); failed != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: go_echo PORT [BACKLOG]")
		os.Exit(2)
	}
	listener, err := net.Listen("tcp4", "127.0.0.1:"+os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "go_echo:", err)
		os.Exit(1)
	}
	fmt.Printf("listening %d\n", listener.Addr().(*net.TCPAddr).Port)
	for {
		connection, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond) // without descriptors, say
			continue
		}
		go serve(connection)
	}
}
