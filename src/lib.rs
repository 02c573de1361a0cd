//! freightfs shows virtual machine images as virtual files in every disk format, computed as they are read, and
//! turns a copy into a bucket's directory into an export job with a status file beside the object.
//!
//! # Levels
//!
//! A module imports lower levels only; `tests/architecture.rs` reads this table and fails on any other import, and on a
//! circle between files.
//!
//! | level | modules | what they own |
//! |---|---|---|
//! | 1 | [`error`], [`units`], [`metrics`], [`header`] | the one error type; offsets and sizes as types; counters; on-disk headers |
//! | 2 | [`format`](mod@format), [`codec`], [`extent`], [`failpoint`], [`whole_file`] | the names of the formats; compressors; data, zeros, holes and allocation maps; the durable steps, for tests; files that are read whole |
//! | 3 | [`policy`], [`vfile`], [`layout`], [`storage`] | what may be exported; the trait of computed files; where each byte of a file of some format comes from; bytes by position |
//! | 4 | [`settings`], [`image`] | mount options; readers: a file as the disk its guest sees |
//! | 5 | [`bucket`], [`convert`] | objects and uploads; image × layout (× compressor) = a file |
//! | 6 | [`catalog`], [`export`] | which images there are, in a directory or a bucket; jobs, their journal, their status |
//! | 7 | [`vfs`] | names, handles, and what a copy means; knows nothing of FUSE |
//! | 8 | [`fuse`] | the kernel's protocol; the only user of fuser |
//! | 9 | [`cli`] | arguments, wiring, the daemon |
//!
//! Readers, layouts and `convert` are synchronous, positional and shared between threads; `bucket` and
//! `export` are asynchronous. [`vfs`] is where the two meet: what may wait is an `async fn`, and synchronous work that may
//! take long goes to a thread of its lane. No lock of a synchronous kind is held while anything waits.
//!
//! # Waiting
//!
//! [`fuse`] answers on the dispatcher's threads what cannot wait: reads of local images, and writes into a staged file that
//! nobody else changes. Every other request is a task, and what a task waits for, a store, a job, a lock of the file that it
//! is about, is waited for by no thread. So whatever hangs holds up the requests that need it, and these only: an object
//! those that read or write it, a bucket those that list it or look names up in it, an image those that read it. An upload
//! holds up the close of its file, and no getattr. Bounds: 16 threads for the readers of each image, for listings of the
//! catalog, and for staged files, 512 for all images together, one for each request that a local bucket may have in flight;
//! each write that waits holds its up to 1 MiB; a file that is removed while it is open and that only the bucket has is
//! fetched up to 256 MiB and for 10 seconds; 32 files under rsync's temporary names,
//! for an hour, wait for their own.
//!
//! # Read path
//!
//! The kernel asks [`fuse`] for up to 1 MiB of, say, `web01.vhd`. The file was opened with direct I/O, so there is
//! no second copy in the page cache. A dispatcher thread calls [`vfs::Vfs::read_now`], which finds the handle's
//! [`convert::ConvertedFile`], fixed at open to one generation of the source. That asks the
//! [`layout::Layout`] which [`layout::Region`] stands at the offset: headers and tables, which the layout
//! makes up; zeros; or a run of the guest's disk. A layout reads nothing: it was built from the disk's virtual size
//! and an [`extent::AllocationMap`], a bitmap with rank samples that says how many units before a given one are
//! allocated, and so where everything is. Guest bytes come from the [`image::DiskImage`]; the qcow2 reader walks
//! its L2 tables, kept in a bounded cache, reads neighbouring clusters at once straight into the reply's buffer,
//! and inflates compressed ones on all cores. Last, the source's generation is compared: if it changed, the read
//! fails with `ESTALE` instead of mixing bytes.
//!
//! Where the catalog is a bucket, its files are a [`catalog::BucketFiles`]: each image is read through a
//! [`bucket::ObjectFile`] in blocks, by requests that name the entity tag, and the blocks are kept in the one
//! [`bucket::BlockCache`] of the mount. Readers do not know the difference; such reads, and those of
//! compressed files, are made by [`vfs::Vfs::read`] on a thread of the image's lane.
//!
//! An object of a bucket is read through the same blocks, by a task, without a thread; one that is being written from its
//! staged file; one that an export is making through the converter.
//!
//! Listing needs the exact size of each file, and so the allocation map: one walk over the image's tables at its
//! first look-up, shared by all formats with the same unit. No image data is read before somebody reads it.
//!
//! In a compressed file every place depends on how long all units before it became. A
//! [`convert::CompressedFile`] compresses units in order, in parallel, only as far as somebody reads, and keeps their
//! lengths, a [`layout::compressed::LengthIndex`]: with it any byte that was passed once can be had again by
//! compressing one unit. Formats whose head is fixed stream from their start; a compressed qcow2 needs one pass
//! first. A [`convert::Workspace`] keeps what was computed: records in bounded memory, bodies on disk while there
//! is room, and finished indices across mounts, under the file's identity.
//!
//! What a file's bytes depend on is its [`storage::Identity`]: the generations of all files of the chain, what the
//! catalog says of the image, the layout with its version and options, what the compressor makes of a fixed text, and
//! the digest of the allocation map, which is no function of a raw image's content: it tells a filesystem's holes. What
//! was made already, what is continued, and what two hosts mean is asked of it and of nothing else.
//!
//! Everything that other programs make random, identifiers and times, is derived from the source, so two
//! conversions of one source are byte-identical.
//!
//! # Open objects
//!
//! An open object is a file of its own, a draft. A name leads to it, and so does an inode number; handles hold it. All
//! handles on it see the same bytes. When the name is removed or given to another file by a rename, its number and its
//! handles keep it, with a link count of 0, and nothing of it is published any more; the name's new file has another
//! number, or the same one in another generation when the kernel had forgotten the old one. A rename takes the number
//! along, and what was written is published under the new name. Another host's new version of an object is another file.
//!
//! Drafts know buckets, jobs and lanes by their publisher, and not the mount.
//!
//! # Export path
//!
//! `cp images/web01/web01.vhd buckets/b/` creates a draft ([`vfs`]) and sends `copy_file_range`. The draft only
//! records that range. At close(2) the kernel sends a flush: when the recorded ranges cover the whole file,
//! [`export::JobQueue::submit`] writes a record into the journal, synced, and close returns. If anything else
//! arrives, parts, other offsets, plain writes, the bytes are staged in a file, and close waits for its upload,
//! because a writer of plain bytes expects close to tell: a task waits, and what is written before it ends is published
//! after it. The first write to an object that the bucket has fetches it into such a file. Of a large one, parts that the writer has passed are sent
//! meanwhile; the job at the end takes that upload over and sends what is missing or was written again.
//!
//! What may be exported is a [`policy::Policy`], data: the vfs asks it when an image's file is opened, when a name in a
//! bucket is created, when a copy brings both together, and by name and content when anything is published or renamed.
//!
//! The job is a value to display and to wait for; its run owns the work. It waits for a place among those of its bucket,
//! opens a multipart upload, begins its log, and then reads the converted file piece by piece to its end, which of a
//! compressed file is known only then; threads hash each piece, and cut it into chunks, while parts are made and the next one is
//! read. Which parts there are follows from the chunks that the object which is replaced has (`export/reuse`): they are sent, or
//! copied by the store, from that object or from zeros, and each copy is compared with the file. What all
//! parts of a mount take in memory, read ahead, in flight and waiting for their hashes, has one bound, of which each
//! bucket has a share. The store checks each part when it arrives, so that an object is whole before it is completed; it
//! is put in place over what it replaces and nothing else. Then `KEY.sha256`, `KEY.md5` and at last `KEY.status` are
//! written ([`export::sidecars`]). Before that nothing is visible in the bucket but the status; in the mount the key
//! already has its final size and reads through the converter. A job that fails or is cancelled aborts its upload and
//! leaves a status that says why.
//!
//! A daemon that is killed leaves records, logs and staged files. What the next one over the same state directory makes
//! of a job is a function of the state in which it finds it ([`export::stage`]):
//!
//! | state | what is durable | next step | the next mount |
//! |---|---|---|---|
//! | Recorded | the record: request, source, what the object replaces; staged bytes | start an upload, create its log | begins; waits while its bucket or image is not in this mount |
//! | Sending | the log: the upload's id, parts that are planned and that the store has, states of the hashes, chunks | send or copy, and hash, the other parts; record what is about to be put in place | sends what the log does not have |
//! | Publishing | the intent: the entity tag to come, or size and digests | put the object in place, over what it replaces only | asks the bucket: in place, or resumes; another object there stays |
//! | Placed | the object; the log: its size, digests and entity tag | put the index of its chunks and the checksums, record the end | SUCCESS, whatever the source is by now; what stands beside another object stays |
//! | Ended | the record: the final status, and that the bucket lacks it | put the final status; end the lease; wake who waits | puts the final status, unless that of a newer job is there; tries again while mounted |
//! | Told | the final status in the bucket; the record says so | none; the oldest records are removed | shown in jobs/ |
//!
//! An upload that is about to be started is an intent too: what earlier uploads of the key there are and the store's time, by
//! which one whose id was never received is found and aborted, and no other program's.
//!
//! Every step is intent, act, done, and each is a [`failpoint`]. A damaged record costs its own job, whose status ends with
//! the reason; a damaged line of a log costs the parts before it. A job whose store does not say whether the object is in
//! place stays in Publishing and asks, and who waits in close gets the error meanwhile. Jobs that wait for a bucket or an image of theirs stay,
//! visibly, until it is there again or somebody cancels them.
//!
//! A store has no rename: an object is copied, removed under its old name, and its sidecars follow; in a local bucket the
//! first two are one step of the filesystem. Before the first step a line in the state directory says what there was at
//! both names, with entity tags ([`export::moves`]), and so it does before an object is removed that has sidecars. What is
//! left after a crash, or after a request that failed, is a function of what the bucket shows; whoever comes to one of the
//! names meanwhile waits:
//!
//! | progress | what the bucket shows | what is done |
//! |---|---|---|
//! | Unmade | the old name's object as recorded; none or another at the new one | nothing: it was not renamed, or not removed |
//! | Made | the old name's object as recorded; the same at the new one | removes the old one, if it is as recorded still; what stands beside it follows |
//! | Moved | none or another at the old name; the object at the new one | what stood beside the old one follows |
//! | Gone | none or another at the old name; none or another at the new one | what stood beside an object that is gone is removed |
//!
//! Hosts that share a bucket agree in it: an object for each epoch of a key's lease, created by a put that fails when it
//! is there, and heartbeats that carry the upload's log. A host that sees no heartbeat for one lease period takes
//! the job over; the epoch is the fencing token.
//!
//! # Requests to a store
//!
//! Each request that writes says what it replaces, a [`bucket::Replaces`]: the store compares, or a local bucket does under
//! a lock, and [`error::ErrorKind::Conflict`] says that something else is there. Each part and each object is sent with a
//! checksum that the store compares with what it has received, or the part's entity tag is compared with the part: what
//! arrives damaged is sent again, and never takes the place of what was there. What a store can do of this is found out at
//! mount ([`bucket::Bucket::probe`]), by requests that it must refuse; what it cannot is looked for before the request, and
//! said in [`bucket::Bucket::limitation`].
//!
//! Store errors are classified in one place (`bucket/reply.rs`): refused for good, changed, not there, damaged, or transient.
//! Single requests are retried by the store's client, whole jobs are resumed with back-off and jitter. Requests in flight are
//! bounded by class, each with a lane of its own (`bucket/limits.rs`), so that a listing does not wait for parts of uploads;
//! look-ups and listings of a store that does not answer are given up after 30 seconds. The same holds for a local bucket,
//! whose threads keep their requests' places until they end.
//!
//! # Options
//!
//! A mount's options are one table, [`settings::OPTIONS`]: flags, words of `-o`, keys of the configuration file, and the
//! lists of the manual are made of it, and each value is checked in one place whichever way it came.
//!
//! # Trust
//!
//! Images and object names are hostile input. A file that an image names is opened only through an
//! [`image::ReferenceGate`]; a raw image is never probed for another format; header fields are checked against
//! the file's length before anything is allocated. No disk above [`image::MAX_VIRTUAL_SIZE`] is read. A walk over an
//! image's tables ([`image::DiskImage::visit_extents`]) is bounded by the bytes of its files: tables that overlap are
//! refused, those in holes are not read, a file below another is walked only where the one above has nothing. What is
//! inflated of all images has one bound ([`image::inflated`]). Objects in a local bucket are opened beneath its directory by
//! the kernel (openat2), so that no symbolic link leads out. There is no unsafe code.
//!
//! What is printed or logged goes through one module each (`cli/terminal.rs`, `cli/log.rs`), which escape what a terminal
//! obeys and redact URLs ([`error::redacted`]). Before its first thread the daemon gives up its user, capabilities, files
//! and system calls as far as it can (`cli/sandbox.rs`); a process beside it mounts and unmounts (`cli/mounter.rs`).

pub mod bucket;
pub mod catalog;
pub mod cli;
pub mod codec;
pub mod convert;
pub mod error;
pub mod export;
pub mod extent;
pub mod failpoint;
pub mod format;
pub mod fuse;
pub mod header;
pub mod image;
pub mod layout;
pub mod metrics;
pub mod policy;
pub mod settings;
pub mod storage;
pub mod units;
pub mod vfile;
pub mod vfs;
pub mod whole_file;
