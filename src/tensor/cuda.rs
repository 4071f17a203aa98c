//! Tensors as kernels of a GPU take them.

use std::sync::Arc;

use super::storage::Storage;
use super::{DType, Tensor};
use crate::device::Context;
use crate::device::cuda::{Precision, Source, Stream, Taken, convert};
use crate::error::{Error, Result};

impl DType {
    /// The type on a GPU, if the elements are floats.
    pub(crate) fn precision(self) -> Option<Precision> {
        match self {
            DType::F32 => Some(Precision::F32),
            DType::F16 => Some(Precision::F16),
            DType::BF16 => Some(Precision::BF16),
            DType::I64 | DType::U8 | DType::I8 => None,
        }
    }

    /// The type of activations on the context's device.
    pub(crate) fn of_activations(cx: &Context) -> DType {
        match cx.device().accelerator().map(|accelerator| accelerator.precision()) {
            None | Some(Precision::F32) => DType::F32,
            Some(Precision::F16) => DType::F16,
            Some(Precision::BF16) => DType::BF16,
        }
    }
}

impl Tensor {
    /// The type of the elements on a GPU.
    ///
    /// # Errors
    /// `InvalidArgument`, naming `what`, if they are no floats.
    pub(crate) fn precision(&self, what: &str) -> Result<Precision> {
        self.dtype.precision().ok_or_else(|| Error::argument(what, "a float type", self.dtype))
    }

    /// The elements on the device, to be read by work of `stream`, in their own type. What lies on the host is
    /// uploaded; what lies in a weight file stays on the device from then on.
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`.
    pub(crate) fn on(&self, cx: &Context, stream: &Arc<Stream>) -> Result<Taken> {
        let bytes = self.elements() * self.dtype.size();
        match &self.storage {
            Storage::Mirrored(mirrored) => {
                if let Some(taken) = mirrored.taken(stream, self.offset)? {
                    return Ok(taken);
                }
            }
            Storage::Mapped(_) => return self.resident(cx, stream, self.dtype.precision()),
            Storage::Host(_) => {}
        }
        let memory = stream.take("a tensor from the host", bytes)?;
        stream.upload(self.bytes()?, &memory, 0)?;
        Ok(stream.using_memory(Arc::new(memory)))
    }

    /// The elements on the device, as `wanted`. A weight of a file is converted once.
    ///
    /// # Errors
    /// As [`Tensor::on`]; `InvalidArgument`, naming `what`, if they are no floats.
    pub(crate) fn on_as(
        &self,
        cx: &Context,
        stream: &Arc<Stream>,
        what: &str,
        wanted: Precision,
    ) -> Result<Taken> {
        let own = self.precision(what)?;
        if own == wanted {
            return self.on(cx, stream);
        }
        if let Storage::Mapped(_) = self.storage {
            return self.resident(cx, stream, Some(wanted));
        }
        let source = self.on(cx, stream)?;
        let memory = stream.take("a converted tensor", self.elements() * wanted.size())?;
        // SAFETY: the source has this many numbers, and there is room for as many.
        unsafe { convert(stream, (source.address(), own), (memory.address(), wanted), self.elements())? };
        Ok(stream.using_memory(Arc::new(memory)))
    }

    /// Whether the elements lie on a device, whatever copy the host may have of them.
    pub(crate) fn is_on_device(&self) -> bool {
        matches!(&self.storage, Storage::Mirrored(mirrored) if mirrored.is_on_device())
    }

    fn resident(&self, cx: &Context, stream: &Arc<Stream>, wanted: Option<Precision>) -> Result<Taken> {
        let (Some(accelerator), Some(file)) = (cx.device().accelerator(), self.storage.file()) else {
            return Err(Error::internal("a weight", "not on a GPU or not in a file"));
        };
        let source = Source { what: "a weight", bytes: self.bytes()?, precision: self.dtype.precision() };
        accelerator.residents().get(stream, source, wanted, || file)
    }

    /// The address of the elements on the device, to be written by work of `stream`. Only the sole owner may; what
    /// was in them is there.
    ///
    /// # Errors
    /// `Internal` if they are shared or of another stream; `OutOfMemory`; `Device`.
    pub(crate) fn on_mut(&mut self, stream: &Arc<Stream>) -> Result<u64> {
        let offset = self.offset as u64;
        match &mut self.storage {
            Storage::Mirrored(mirrored) => match Arc::get_mut(mirrored) {
                Some(mirrored) => Ok(mirrored.address_mut(stream)? + offset),
                None => Err(Error::internal("a tensor", "written while it is shared")),
            },
            _ => Err(Error::internal("a tensor", "on the host, and written on a GPU")),
        }
    }

    /// The stream whose memory this is, if it is a GPU's.
    pub(crate) fn stream(&self) -> Option<Arc<Stream>> {
        match &self.storage {
            Storage::Mirrored(mirrored) => Some(mirrored.stream().clone()),
            _ => None,
        }
    }

    /// Whether the elements can be read without waiting for a GPU.
    pub(crate) fn is_on_host(&self) -> bool {
        match &self.storage {
            Storage::Mirrored(mirrored) => mirrored.is_on_host(),
            _ => true,
        }
    }

    /// Moves what lies on the host to the context's device, if that is a GPU: to be written there from now on.
    ///
    /// # Errors
    /// `OutOfMemory`; `Device`.
    pub(crate) fn settle(&mut self, cx: &Context) -> Result<()> {
        if cx.cuda()?.is_some() && self.stream().is_none() {
            *self = self.copied(cx)?;
        }
        Ok(())
    }

    /// The numbers in another float type, beside these on their GPU; nothing if they lie on none.
    ///
    /// # Errors
    /// `InvalidArgument` for types that are no floats; `OutOfMemory`; `Device`.
    pub(crate) fn converted_there(&self, dtype: DType) -> Result<Option<Tensor>> {
        let Storage::Mirrored(mirrored) = &self.storage else { return Ok(None) };
        let (stream, what) = (mirrored.stream(), "numbers in another type");
        let wanted = dtype.precision().ok_or_else(|| Error::argument(what, "a float type", dtype))?;
        let own = self.precision(what)?;
        let storage = Arc::new(mirrored.like(what, self.elements() * dtype.size()));
        let mut out =
            Tensor { dtype, storage: Storage::Mirrored(storage), offset: 0, tracked: None, ..*self };
        let Some(from) = mirrored.taken(stream, self.offset)? else {
            return Err(Error::internal(what, "in another stream than their own"));
        };
        let to = out.on_mut(stream)?;
        // SAFETY: both have this many numbers of their types.
        unsafe { convert(stream, (from.address(), own), (to, wanted), self.elements())? };
        Ok(Some(out))
    }
}
