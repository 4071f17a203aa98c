package wuerstchen

// #include <wuerstchen.h>
import "C"

// Device is something that a model can run on.
type Device struct {
	// Name is what WithDevice takes: "cpu", "cuda:0".
	Name string
	// Description is the name of the hardware.
	Description string
	// Threads counts the cores that this process may use.
	Threads int
	// MemoryBytes is the size of its memory, MemoryAvailableBytes what of it is free now.
	MemoryBytes, MemoryAvailableBytes uint64
}

// Devices lists what models can run on. The first is always the CPU.
func Devices() ([]Device, error) {
	devices := make([]Device, C.wst_device_count())
	for i := range devices {
		var info C.wst_device_info_t
		info.struct_size = C.uint32_t(C.sizeof_wst_device_info_t)
		var cError *C.wst_error
		if err := check(C.wst_device_info(C.size_t(i), &info, &cError), &cError); err != nil {
			return nil, err
		}
		devices[i] = Device{
			Name:                 C.GoString(&info.name[0]),
			Description:          C.GoString(&info.description[0]),
			Threads:              int(info.threads),
			MemoryBytes:          uint64(info.memory_bytes),
			MemoryAvailableBytes: uint64(info.memory_available_bytes),
		}
	}
	return devices, nil
}
