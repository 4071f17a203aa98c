//! Where the bytes of a tensor lie: on the host, in a mapped file, or on a GPU with a mirror on the host.

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use memmap2::Mmap;

use crate::device::cuda::{Memory, Stream, Taken};
use crate::device::{Buffer, Context, Pool};
use crate::error::{Error, Result};

/// Where the bytes lie.
#[derive(Clone, Debug)]
pub(super) enum Storage {
    Host(Arc<Buffer>),
    /// A mapped weight file: read-only, paged in on first use.
    Mapped(Arc<Mmap>),
    /// Memory of a GPU's stream.
    Mirrored(Arc<Mirrored>),
}

impl Storage {
    /// Room for `bytes` bytes of arbitrary content, on the context's device.
    pub fn new(cx: &Context, what: &'static str, bytes: usize) -> Result<Self> {
        Ok(match cx.cuda()? {
            None => Storage::Host(Arc::new(cx.device().take(what, bytes)?)),
            Some(stream) => Storage::Mirrored(Arc::new(Mirrored {
                what,
                bytes,
                stream: stream.clone(),
                pool: Arc::downgrade(cx.device().pool()),
                host: OnceLock::new(),
                memory: OnceLock::new(),
                moving: Mutex::new(()),
            })),
        })
    }

    /// All bytes, on the host.
    pub fn bytes(&self) -> Result<&[u8]> {
        match self {
            Storage::Host(buffer) => Ok(buffer.bytes()),
            Storage::Mapped(map) => Ok(map),
            Storage::Mirrored(mirrored) => mirrored.host(),
        }
    }

    /// All bytes, to write on the host. Only the sole owner may.
    pub fn bytes_mut(&mut self) -> Result<&mut [u8]> {
        let shared = || Error::internal("a tensor", "written while it is shared");
        match self {
            Storage::Host(buffer) => Arc::get_mut(buffer).map(Buffer::bytes_mut).ok_or_else(shared),
            Storage::Mapped(_) => Err(Error::internal("a tensor", "a mapped weight is read-only")),
            Storage::Mirrored(mirrored) => Arc::get_mut(mirrored).ok_or_else(shared)?.host_mut(),
        }
    }

    /// Whether nobody else owns the bytes.
    pub fn is_own(&mut self) -> bool {
        match self {
            Storage::Host(buffer) => Arc::get_mut(buffer).is_some(),
            Storage::Mapped(_) => false,
            Storage::Mirrored(mirrored) => Arc::get_mut(mirrored).is_some(),
        }
    }

    /// The mapped file that the bytes are part of, if they are.
    pub fn file(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        match self {
            Storage::Mapped(map) => Some(map.clone()),
            _ => None,
        }
    }
}

/// Bytes of a GPU's stream. They lie where they were used last: on the device, on the host, or, when they were only
/// read since they moved, on both. Before the first use they lie nowhere.
///
/// So an op without a kernel for GPUs computes the same there, only slower: it reads and writes on the host.
#[derive(Debug)]
pub(super) struct Mirrored {
    what: &'static str,
    bytes: usize,
    stream: Arc<Stream>,
    pool: Weak<Pool>,
    host: OnceLock<Buffer>,
    memory: OnceLock<Memory>,
    /// Held while bytes move.
    moving: Mutex<()>,
}

impl Mirrored {
    /// Room for `bytes` bytes of arbitrary content in the same stream.
    pub fn like(&self, what: &'static str, bytes: usize) -> Self {
        Mirrored {
            what,
            bytes,
            stream: self.stream.clone(),
            pool: self.pool.clone(),
            host: OnceLock::new(),
            memory: OnceLock::new(),
            moving: Mutex::new(()),
        }
    }

    fn host(&self) -> Result<&[u8]> {
        if self.stream.is_recording() {
            return Err(Error::internal("a recorded step", format!("reads {} on the host", self.what)));
        }
        if let Some(host) = self.host.get() {
            return Ok(host.bytes());
        }
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        if self.host.get().is_none() {
            let mut buffer = match self.pool.upgrade() {
                Some(pool) => pool.take(self.what, self.bytes)?,
                None => Buffer::new(self.what, self.bytes)?,
            };
            if let Some(memory) = self.memory.get() {
                self.stream.download(memory, buffer.bytes_mut())?;
            }
            // Nobody else sets it: the lock is held.
            let _ = self.host.set(buffer);
        }
        self.host.get().map(Buffer::bytes).ok_or_else(lost)
    }

    fn host_mut(&mut self) -> Result<&mut [u8]> {
        self.host()?;
        self.memory.take();
        self.host.get_mut().map(Buffer::bytes_mut).ok_or_else(lost)
    }

    fn memory(&self) -> Result<&Memory> {
        if let Some(memory) = self.memory.get() {
            return Ok(memory);
        }
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        if self.memory.get().is_none() {
            let memory = self.stream.take(self.what, self.bytes)?;
            if let Some(host) = self.host.get() {
                self.stream.upload(host.bytes(), &memory, 0)?;
            }
            let _ = self.memory.set(memory);
        }
        self.memory.get().ok_or_else(lost)
    }

    /// Whether it lies on the device.
    pub fn is_on_device(&self) -> bool {
        self.memory.get().is_some()
    }

    /// Whose memory it is.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Whether the host has the bytes.
    pub fn is_on_host(&self) -> bool {
        self.host.get().is_some()
    }

    /// The address on the device, to write: the host's copy is given up. What another stream than its own writes
    /// becomes that one's, by way of the host.
    pub fn address_mut(&mut self, stream: &Arc<Stream>) -> Result<u64> {
        if !Arc::ptr_eq(&self.stream, stream) {
            if self.memory.get().is_some() {
                self.host_mut()?;
            }
            self.stream = stream.clone();
        }
        let address = self.memory()?.address();
        self.host.take();
        Ok(address)
    }

    /// `offset` bytes into it, for work of `stream`; nothing if that is another stream, which must not read what may
    /// be freed and used again here.
    pub fn taken(self: &Arc<Self>, stream: &Arc<Stream>, offset: usize) -> Result<Option<Taken>> {
        if !Arc::ptr_eq(&self.stream, stream) {
            return Ok(None);
        }
        let memory = self.memory()?;
        Ok(Some(stream.using_part(memory, Taken::new(memory.address(), offset, self.clone()))))
    }

    /// Sets all bytes to zero, where they are going to be used.
    pub fn clear(&mut self) -> Result<()> {
        self.host.take();
        self.stream.clear(self.memory()?)
    }
}

fn lost() -> Error {
    Error::internal("a tensor", "its bytes are nowhere")
}
