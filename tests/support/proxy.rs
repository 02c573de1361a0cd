//! A proxy before the S3 server that counts requests and lets chosen ones fail as networks and stores do.
//!
//! It asks the server to close each connection after one answer, so that requests and connections are the same.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What a client asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
}

impl Request {
    /// Whether it is a part of an upload.
    pub fn is_part(&self) -> bool {
        self.method == "PUT" && self.target.contains("partNumber=")
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Forward,
    /// The server gets it after this many milliseconds.
    Delay(u64),
    /// The server does not get it, and this is the answer.
    Answer(u16),
    /// The server does not get it, and this is the body of an answer that says that all is well.
    AnswerWell(&'static str),
    /// The connection is closed before the server gets it.
    Cut,
    /// The server gets it, and its answer is lost.
    CutAnswer,
    /// The server gets it, and its answer has another entity tag.
    WrongEtag,
    /// The server does not get it, and there is no answer until the client gives up or the proxy is
    /// [released](Proxy::release), which cuts the connection.
    Hang,
    /// The server gets it when the proxy is [released](Proxy::release).
    Hold,
    /// The server gets it with one bit in the middle of its body flipped.
    DamageRequest,
    /// The answer has one bit in the middle of its body flipped, or of its entity tag where it has no body.
    DamageAnswer,
    /// The answer's body ends in its middle, as if that were all of it.
    HalveAnswer,
}

/// A running proxy.
pub struct Proxy {
    address: String,
    log: Arc<Mutex<Vec<(Request, u16)>>>,
    received: Arc<AtomicUsize>,
    hangs: Arc<Hangs>,
}

/// The requests that hang.
#[derive(Default)]
struct Hangs {
    now: AtomicUsize,
    released: AtomicBool,
}

type Decide = dyn FnMut(&Request) -> Fate + Send;

impl Proxy {
    /// Starts one before `upstream` (`http://host:port`).
    pub fn start(upstream: &str, decide: impl FnMut(&Request) -> Fate + Send + 'static) -> Self {
        let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let decide: Arc<Mutex<Box<Decide>>> = Arc::new(Mutex::new(Box::new(decide)));
        let (shared, hangs) = (Arc::clone(&log), Arc::<Hangs>::default());
        let received = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&received);
        let shared_hangs = Arc::clone(&hangs);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (upstream, decide, log) = (upstream.clone(), Arc::clone(&decide), Arc::clone(&shared));
                let (hangs, received) = (Arc::clone(&shared_hangs), Arc::clone(&counted));
                std::thread::spawn(move || {
                    // A client that goes away is no failure of the proxy.
                    let _ = serve(client, &upstream, &decide, &log, &hangs, &received);
                });
            }
        });
        Self { address, log, received, hangs }
    }

    /// How many requests hang.
    pub fn hanging(&self) -> usize {
        self.hangs.now.load(Ordering::SeqCst)
    }

    /// Cuts the requests that hang, and forwards those that are held; from now on both is done at once.
    pub fn release(&self) {
        self.hangs.released.store(true, Ordering::SeqCst);
    }

    pub fn url(&self) -> String {
        self.address.clone()
    }

    /// The bytes of the bodies that were forwarded to the server so far.
    pub fn received(&self) -> usize {
        self.received.load(Ordering::SeqCst)
    }

    /// The requests that were answered so far, with the status of the answer.
    pub fn answered(&self) -> Vec<(Request, u16)> {
        self.log.lock().unwrap().clone()
    }
}

fn serve(
    mut client: TcpStream,
    upstream: &str,
    decide: &Mutex<Box<Decide>>,
    log: &Mutex<Vec<(Request, u16)>>,
    hangs: &Hangs,
    received: &AtomicUsize,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut head = Vec::new();
    let mut body_length = 0;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let lower = line.to_ascii_lowercase();
        if let Some(length) = lower.strip_prefix("content-length:") {
            body_length = length.trim().parse().unwrap();
        }
        if line == "\r\n" {
            head.extend(b"connection: close\r\n\r\n");
            break;
        }
        if !lower.starts_with("connection:") {
            head.extend(line.as_bytes());
        }
        line.clear();
    }
    let first = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_owned();
    let mut words = first.split(' ').map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(()) };
    let request = Request { method, target };
    let fate = (decide.lock().unwrap())(&request);
    let mut body = vec![0; body_length];
    match fate {
        Fate::Cut => return client.shutdown(Shutdown::Both),
        Fate::Hang => {
            hangs.now.fetch_add(1, Ordering::SeqCst);
            let hung = hang(&mut reader, hangs);
            hangs.now.fetch_sub(1, Ordering::SeqCst);
            return hung.and_then(|()| client.shutdown(Shutdown::Both));
        }
        Fate::Answer(status) => {
            reader.read_exact(&mut body)?;
            let code = if status == 503 { "SlowDown" } else { "Refused" };
            let xml = format!(
                "<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>"
            );
            log.lock().unwrap().push((request, status));
            let length = xml.len();
            return write!(
                client,
                "HTTP/1.1 {status} Fault\r\netag: \"0\"\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{xml}"
            );
        }
        Fate::AnswerWell(answer) => {
            reader.read_exact(&mut body)?;
            log.lock().unwrap().push((request, 200));
            let length = answer.len();
            return write!(
                client,
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{answer}"
            );
        }
        Fate::Hold => {
            hangs.now.fetch_add(1, Ordering::SeqCst);
            while !hangs.released.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            hangs.now.fetch_sub(1, Ordering::SeqCst);
        }
        Fate::Delay(milliseconds) => std::thread::sleep(Duration::from_millis(milliseconds)),
        Fate::Forward
        | Fate::CutAnswer
        | Fate::WrongEtag
        | Fate::DamageRequest
        | Fate::DamageAnswer
        | Fate::HalveAnswer => {}
    }
    reader.read_exact(&mut body)?;
    if fate == Fate::DamageRequest {
        flip_middle(&mut body);
    }
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(&head)?;
    server.write_all(&body)?;
    received.fetch_add(body.len(), Ordering::SeqCst);
    if matches!(fate, Fate::DamageAnswer | Fate::HalveAnswer) {
        return damage_answer(client, server, request, log, fate == Fate::HalveAnswer);
    }
    let mut answer = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        let read = server.read(&mut chunk)?;
        let first = answer.is_empty();
        if first {
            answer.extend(&chunk[..read.min(32)]);
            let status = String::from_utf8_lossy(&answer).split(' ').nth(1).and_then(|s| s.parse().ok());
            log.lock().unwrap().push((request.clone(), status.unwrap_or(0)));
        }
        if read == 0 || fate == Fate::CutAnswer {
            return client.shutdown(Shutdown::Both);
        }
        if first && fate == Fate::WrongEtag {
            spoil_etag(&mut chunk[..read]);
        }
        client.write_all(&chunk[..read])?;
    }
}

/// Reads what a client sends until it gives up or the proxy is released.
fn hang(reader: &mut BufReader<TcpStream>, hangs: &Hangs) -> std::io::Result<()> {
    reader.get_ref().set_read_timeout(Some(Duration::from_millis(20)))?;
    let mut sink = [0; 1 << 16];
    while !hangs.released.load(Ordering::SeqCst) {
        match reader.read(&mut sink) {
            Ok(0) => break,
            Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
            _ => {}
        }
    }
    Ok(())
}

fn flip_middle(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
}

/// Passes an answer on, one bit of it flipped, or half of it as a whole one.
fn damage_answer(
    mut client: TcpStream,
    mut server: TcpStream,
    request: Request,
    log: &Mutex<Vec<(Request, u16)>>,
    halves: bool,
) -> std::io::Result<()> {
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let status = String::from_utf8_lossy(&answer[..answer.len().min(32)])
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok());
    log.lock().unwrap().push((request, status.unwrap_or(0)));
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    if halves {
        answer = halved(&answer[..head], &answer[head..]);
    } else if head < answer.len() {
        flip_middle(&mut answer[head..]);
    } else {
        spoil_etag(&mut answer);
    }
    client.write_all(&answer)?;
    client.shutdown(Shutdown::Both)
}

/// An answer whose body is the first half of this one, and whose head says so.
fn halved(head: &[u8], body: &[u8]) -> Vec<u8> {
    let half = &body[..body.len() / 2];
    let head = String::from_utf8_lossy(head);
    let is_length = |line: &&str| line.to_ascii_lowercase().starts_with("content-length:");
    let is_chunked = |line: &&str| line.to_ascii_lowercase().starts_with("transfer-encoding:");
    if body.is_empty() || head.lines().any(|line| is_chunked(&line)) {
        return [head.as_bytes(), half].concat();
    }
    let lines = head.trim_end().lines().filter(|line| !is_length(line));
    let head: String = lines.map(|line| format!("{line}\r\n")).collect();
    [format!("{head}content-length: {}\r\n\r\n", half.len()).as_bytes(), half].concat()
}

/// Turns the digits of an answer's entity tags around, in its head and in an XML body.
fn spoil_etag(answer: &mut [u8]) {
    let lower = answer.to_ascii_lowercase();
    for name in [&b"etag: "[..], b"<etag>"] {
        if let Some(at) = lower.windows(name.len()).position(|window| window == name) {
            let value = &mut answer[at + name.len()..];
            let digits = value.iter_mut().skip_while(|byte| !byte.is_ascii_hexdigit());
            for byte in digits.take_while(|byte| byte.is_ascii_hexdigit()) {
                *byte = if *byte == b'0' { b'1' } else { b'0' };
            }
        }
    }
}
