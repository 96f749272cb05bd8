//! tokio_echo: a task for each connection on the single-threaded runtime, a 64 KiB buffer for each.
//!
//!     tokio_echo PORT [BACKLOG]
//!
//! Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const BUFFER_BYTES: usize = 64 << 10;

async fn serve(mut connection: TcpStream) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let size = connection.read(&mut buffer).await?;
        if size == 0 {
            return Ok(());
        }
        connection.write_all(&buffer[..size]).await?;
    }
}

async fn listen(port: u16, backlog: u32) -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(([127, 0, 0, 1], port).into())?;
    let listener = socket.listen(backlog)?;
    println!("listening {}", listener.local_addr()?.port());
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                tokio::spawn(serve(connection));
            }
            // Without descriptors, say.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let port = arguments.next().and_then(|text| text.parse().ok());
    let backlog = arguments.next().map_or(Some(128), |text| text.parse().ok());
    let (Some(port), Some(backlog)) = (port, backlog) else {
        eprintln!("usage: tokio_echo PORT [BACKLOG]");
        std::process::exit(2);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    if let Err(error) = runtime.block_on(listen(port, backlog)) {
        eprintln!("tokio_echo: {error}");
        std::process::exit(1);
    }
}
