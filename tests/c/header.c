/* The header alone, first, and twice. */
#include "wuerstchen.h"
#include "wuerstchen.h"

#define SIZE_IS(type, bytes) typedef char size_of_##type[sizeof(type) == (bytes) ? 1 : -1]
#define AT(type, field, bytes) typedef char at_##type##_##field[offsetof(type, field) == (bytes) ? 1 : -1]

/* Shipped layouts: fields may be added at the end, and then only the sizes change here. */
SIZE_IS(wst_progress, 32);
AT(wst_progress, stage, 4);
AT(wst_progress, step, 8);
AT(wst_progress, steps, 12);
AT(wst_progress, seconds, 16);
AT(wst_progress, preview, 24);
SIZE_IS(wst_device_info_t, 216);
AT(wst_device_info_t, threads, 4);
AT(wst_device_info_t, memory_bytes, 8);
AT(wst_device_info_t, memory_available_bytes, 16);
AT(wst_device_info_t, name, 24);
AT(wst_device_info_t, description, 88);
SIZE_IS(wst_model_info_t, 96);
AT(wst_model_info_t, generation, 4);
AT(wst_model_info_t, stage_a_parameters, 8);
AT(wst_model_info_t, image_encoder_parameters, 40);
AT(wst_model_info_t, default_width, 48);
AT(wst_model_info_t, latent_width, 64);
AT(wst_model_info_t, bytes_mapped, 72);
AT(wst_model_info_t, bytes_device, 88);
SIZE_IS(wst_train_metrics, 32);
AT(wst_train_metrics, skipped, 4);
AT(wst_train_metrics, step, 8);
AT(wst_train_metrics, loss, 16);
AT(wst_train_metrics, token_accuracy, 28);
SIZE_IS(wst_train_progress, 32);
AT(wst_train_progress, step, 8);
AT(wst_train_progress, samples, 24);
SIZE_IS(wst_loader_info_t, 48);
AT(wst_loader_info_t, epoch, 8);
AT(wst_loader_info_t, damaged_shards, 40);
SIZE_IS(wst_status, 4);
SIZE_IS(wst_dtype, 4);
SIZE_IS(wst_stage, 4);

int main(void) {
    return wst_version() == NULL;
}
